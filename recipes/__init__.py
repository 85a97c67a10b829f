"Recipes: one TOML per reproducible run."
