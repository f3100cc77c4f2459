"""What a model is trained to do, one file per objective."""
