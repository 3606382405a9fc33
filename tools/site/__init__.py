"""The parts of the documentation's site that are made of the code: reference pages, the table of
`lola_config`, the picture of the front page, and the hook through which MkDocs gets them."""
