"""The suite on Kaggle: what is pushed, what runs there, and the commands for both."""
