"""Reading data sets in the form that the builders of `datasets_scripts` write."""
