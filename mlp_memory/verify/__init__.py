"""Whether everything in a workdir is as it was made, and what to make again where it is not."""
