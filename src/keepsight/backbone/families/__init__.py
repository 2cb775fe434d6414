"""The rows: one file for the families of one house or one way of building. `keepsight.backbone.table` joins them."""
