"""Integrations with other libraries; each is imported only on request."""
