"""Where examples come from: sources, transforms, the loader, and the store of codes."""
