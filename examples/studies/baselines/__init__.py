"""What a loss is compared with: no training, heads on frozen encoders, students from scratch."""
