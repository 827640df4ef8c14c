import runpy
import warnings

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_documents_table_is_what_the_script_prints():
    script = runpy.run_path(str(ROOT / "docs/compare_pruning_tools.py"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = script["table"]()
    assert table in (ROOT / "docs/pruning.md").read_text()
