"""Predictors and what turns their outputs into pixels, pictures and files."""
