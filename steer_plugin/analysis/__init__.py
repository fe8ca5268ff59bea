"""Looking at records of steered runs: gates by layer, token, class and dimension."""

from steer_plugin.analysis.gates import plot_gates, plot_profile

__all__ = ["plot_gates", "plot_profile"]
