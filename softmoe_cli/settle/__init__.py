"""Comparisons that end: rounds of seeds until every arm has its verdict, at costs that were made equal."""
