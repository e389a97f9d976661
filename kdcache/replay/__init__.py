"""The seam between the two stages: views are rendered again, checked against what the teacher saw, and streamed with targets."""
