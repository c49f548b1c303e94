"""What is minimized. Values per example where the loss is one, so that the caller takes the mean; always in float32."""
