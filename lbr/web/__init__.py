"""The dashboard in a browser: a server with JSON of what `lbr.api` and the store report, and the pages that show it."""
