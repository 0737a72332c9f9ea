"The papers' tables, compared."
from .comparison import Comparison, Variant, compare, publish
from .before_a_run import dry_run, dry_run_modalities, dry_run_text
from .tables import compare_table, list_tables, paper_table, table_recipe

__all__ = ["Comparison", "Variant", "compare", "compare_table", "dry_run", "dry_run_modalities", "dry_run_text", "list_tables", "paper_table", "publish", "table_recipe"]
