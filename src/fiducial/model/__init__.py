"""The model: loading it, packed attention, the chunked head, and scoring with them."""
