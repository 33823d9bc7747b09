"""Images and labels: layouts on disk, sets of them, which images fill a batch, and how they are brought to
the network's size."""
