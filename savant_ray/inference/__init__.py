"""What a trained model is asked: to go on with a text, and how well it predicts one."""
