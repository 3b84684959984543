"""In-batch ranking by ordered ids: the folder that keeps them, its command, and the loss."""

from rankloss_trainers.orders.folder import Orders as Orders
from rankloss_trainers.orders.folder import bind as bind
