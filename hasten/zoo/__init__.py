"""Small trained reference models that ship with hasten, and the recipes that made them."""
