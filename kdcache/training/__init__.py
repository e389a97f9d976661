"""What teachers and students in training share."""
