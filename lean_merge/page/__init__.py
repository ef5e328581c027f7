"""Pages that show what was found: one HTML file each, which opens offline and asks nobody.

They are made from the dictionaries that are stored as JSON, and from nothing else. Plotly draws;
it comes with the extra `report`.
"""

from lean_merge.page.comparison import comparison_page, write_comparison_page
from lean_merge.page.document import MEND, report_available
from lean_merge.page.report import report_page, write_report
from lean_merge.page.sweep import sweep_page, write_sweep_page

__all__ = [
    "MEND",
    "comparison_page",
    "report_available",
    "report_page",
    "sweep_page",
    "write_comparison_page",
    "write_report",
    "write_sweep_page",
]
