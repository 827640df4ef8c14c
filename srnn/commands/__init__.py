"""The commands of ``python -m srnn``, a file each."""
