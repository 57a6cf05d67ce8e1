"""Config files of the training stages."""
