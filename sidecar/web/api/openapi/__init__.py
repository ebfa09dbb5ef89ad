"""The OpenAPI document: the calls as rows of tables, and the document made from them."""
