"""The benchmark: methods x data x missing rates x seeds, one run folder per cell, one table at the end.

A method is a point in the grid (imputer, fusion, scorer, loss) x strategy (`methods`), a recipe says which data and how
long (`recipes`), a plan makes the cells (`plan`), a cell is run or taken up where it stopped (`execution`), and the
outcomes become a table (`comparison`, `tables`). Nothing here knows Ray: where cells run is given from outside.
"""
