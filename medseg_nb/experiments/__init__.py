"The papers' tables, compared."
