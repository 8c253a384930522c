"""How good features are: linear probes, and the figures and tables that set scores beside accuracies."""
