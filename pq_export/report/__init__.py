"""The report of one export: a single self-contained HTML page, made from numbers that other stages wrote."""
