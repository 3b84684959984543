"""What runs on the GPU, in Triton's language; importing a module of it imports Triton."""
