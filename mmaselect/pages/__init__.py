"""Pages: HTML files that need nothing else, neither a network nor a file beside them.

from mmaselect.pages import write_report

write_report('work_dirs/demo/selection.json')  # or its folder; gives the path of report.html
"""

from mmaselect.pages.report import write_report

__all__ = ['write_report']
