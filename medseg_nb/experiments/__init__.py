"The papers' tables, compared."
from .comparison import Comparison, Variant, compare, publish
from .tables import compare_table, list_tables, paper_table

__all__ = ["Comparison", "Variant", "compare", "compare_table", "list_tables", "paper_table", "publish"]
