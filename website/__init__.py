"""The documentation site: the pages that are generated, and the check of links."""
