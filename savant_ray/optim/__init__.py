"""Parameters and gradients: the update, its schedule, and bf16 weights that learn."""
