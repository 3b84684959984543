"""What is trained in the studies: students from scratch, heads on frozen encoders; and their measures."""
