"""What a plug-in for any trainer needs: the catalogue of losses, and a loss that knows where training stands.

Nothing here imports a trainer, and this module imports nothing.
"""
