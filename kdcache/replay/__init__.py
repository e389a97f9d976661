"""The link between the two stages: views are rendered again, checked against the teacher's, and streamed with targets."""
