"""The sizes on the page, and the fixed settings."""

D, ITERATIONS, PER_CENTROID, NPROBE = 512, 20, 50, 16
PLANS = {6_000: 600, 60_000: 6_000, 10**6: 10_000, 10**7: 100_000, 10**8: 10**6}
BACKBONE, SIDE = "resnet50", 224
# The section of the page that benchmarks/simulation.py writes.
BEGIN, END = "<!-- begin benchmarks/simulation.py -->", "<!-- end benchmarks/simulation.py -->"
