"""Encode text to ids and decode it: tokenizers of two kinds, Marian's own rules, and detokenizers."""
