"""Reading and writing data sets in the form that the builders of `datasets_scripts` write."""
