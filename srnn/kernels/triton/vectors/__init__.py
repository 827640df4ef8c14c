"""One stream a row of programs: each multiplies its units' weights with all of h."""
