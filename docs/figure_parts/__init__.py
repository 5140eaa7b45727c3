"""Parts of the drawings: strokes and inputs that several share, diagrams of boxes and arrows."""
