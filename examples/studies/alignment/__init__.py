"""Two encoders in one space in closed form: as heads, and as a teacher of students."""
