"""Stage 5: the paper's tables and figures, and what lies behind them, from any set of run directories."""
