"""The store: one transaction loads the rows that commands name, saves the changes and appends the records."""
