"""Measures decoding techniques: run plan, worker processes, records, metric definitions, statistics, summary, figures."""
