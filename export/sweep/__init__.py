"""``sweep``: the paper's study (arXiv 2407.15516, section 4) on any model. What a fraction costs and gains."""
