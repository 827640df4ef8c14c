"""What ``srnn bench`` times, a file each: options in, rows out."""
