"""An index of a data set: facts that training needs of every record before it reads one, built once and mapped."""
