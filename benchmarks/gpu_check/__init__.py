"""The check of the attention kernel on a GPU: parity and speed, from PTX that was compiled elsewhere."""
