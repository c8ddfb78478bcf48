"""From text to ids and back: tokenizers of two kinds, Marian's own rules, and text that grows token by token."""
