"""What is minimized, in float32: values per example where the loss is a mean over examples."""
