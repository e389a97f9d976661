"""Stage two: grids of students are planned, costed and trained from archives."""
